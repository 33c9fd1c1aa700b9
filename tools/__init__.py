"""Tools for those who build fsdp_qlora; none is installed with it."""
