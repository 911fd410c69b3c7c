"""How updates become one, and how that moves the global state.

    compatibility     which rules, secrecy, privacy and codecs go together
    updates           signed updates in files, checked on arrival, read a tensor at a time
    fold              their mean, or a robust rule's, a tensor at a time
    robust            median, trimmed mean, Krum; screens for gross faults
    outer             the step along the mean: FedAvg, Nesterov, FedMom, FedAdam
    low_rank          exact means of products B A, and how inexact others are
    low_rank_rounds   rounds whose state is a sum of such products
    low_rank_state    what sites hold in them

Arithmetic on tensors and files; knows nothing of requests, journals and transport.
"""
