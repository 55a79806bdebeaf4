"What a step costs, and what distillation brings: each module is a command that writes a table."
import platform, torch

def machine():
    "Where a benchmark runs"
    return f'{platform.machine()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, one thread'
