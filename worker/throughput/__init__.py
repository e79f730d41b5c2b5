"""The throughput collective: one agent a node sums its counters, and all agents sum each other's.

    python -m megatoken.worker.throughput --config FILE --ready-fd N

Reading order: ledger (what this node counted) -> layout (the vector that is reduced) -> epochs (when, with whom) ->
reducer (the process group) -> rates (what the cluster counted, and how fast) -> agent (the shell that joins them).
group is the controller's half: who is in the next epoch.
"""
