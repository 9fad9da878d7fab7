"""Faults on purpose, under a load whose every token is known: what is left of the requests, and on the machine.

Path in: `runner.py` plays a `schedule.py` of `faults.py` on a `fleet.py` of its own (`injector.py` and
`storage_faults.py` with `room.py`, `thread_stop.py` and `store_relay.py`), while `load.py` asks what `questions.py`
makes up; `verdict.py` judges each answer, `leaks.py` what stays behind, `report.py` tells.
"""
