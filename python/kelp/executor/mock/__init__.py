"""An engine that computes nothing: real scheduling, blocks, prefix cache and handoffs over a timing model.

Path in: `load.py` assembles, `runner.py` is the `ModelRunner`, `language.py` says which token follows, `memory.py`
keeps what each block holds, `pace.py` lets time pass, `executor.py` checks and delays imports. Imports no torch.
"""
