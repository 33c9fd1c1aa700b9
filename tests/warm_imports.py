"""What the fork server of `tests.warm` has imported before it forks; importing this starts no thread and opens nothing."""

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401

import fsdp_qlora.cli.compose
import fsdp_qlora.cli.train
import fsdp_qlora.training  # noqa: F401
