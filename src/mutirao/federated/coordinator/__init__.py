"""The coordinator's side: rounds, what it keeps of them, and what is made of them afterwards.

    rounds         asks the sites, collects answers, steps; goes on from where it stopped
    collect        who was asked, who answered, who is waited for, until when
    secure_round   the same under secure aggregation
    requests       what is asked, with the state or its change
    answers        what may come back, and the check of it
    events         what happens, as it happens
    next_state     mean update, outer step, change for the sites: one tensor at a time
    next_low_rank  the same for states that are sums of low-rank products
    journal        records, states, answers on disk
    state_files    tensors on disk, read and written one at a time
    adapter        the agreed start, and the result
    measures       which site's text is predicted how well, and who contributed what
    unlearning     a run without one of its sites

Knows nothing of transport: it reaches the sites through ``network.Network``.
"""
