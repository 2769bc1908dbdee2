import sys

if sys.platform != "linux":
    raise ImportError(f"reproduce-gpt2 runs on Linux only (also in a container or WSL 2), and this is {sys.platform}")
