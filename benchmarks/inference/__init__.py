"""The parts of ``bench_inference.py``: what is measured, under which limit, and how it is told.

``run_*.py`` are programs of their own, one per engine, started in a fresh process for each
measurement; they import nothing from here but ``recorder``, so that their memory is theirs.
"""
