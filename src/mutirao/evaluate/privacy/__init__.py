"""Attacks on a trained model or on what a site sends, to test a defence by trying to break it.

Canaries (``canaries``), membership of records (``membership``), tokens read from updates
(``updates``), and lower bounds on ε (``audit``). Each comes with two controls: it must
succeed where nothing is defended, and fail where there is nothing to find. An attack that
fails proves nothing about the next one; only ε does.
"""
