"""A CUDA device that is not there: walks a training step on fake tensors as a GPU would run it.

Everything here replaces parts of ``torch.cuda``, so it runs in a process of its own (``python -m tests.fake_cuda``).
"""
