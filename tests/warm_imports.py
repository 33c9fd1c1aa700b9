"""What the fork server of `tests.warm` has imported before it forks; importing this starts no thread and opens nothing."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401

import fsdp_qlora.cli.compose
import fsdp_qlora.cli.export
import fsdp_qlora.cli.generate
import fsdp_qlora.cli.plan
import fsdp_qlora.cli.train
import fsdp_qlora.run.fit  # noqa: F401
