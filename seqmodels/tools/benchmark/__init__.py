"""How fast the operators run on this machine's CPU, as ratios of what was measured side by side.

    cases       what is measured: operators, their inputs, the peers in other libraries
    worker      one measured program in a process of its own (messages: what it is told and answers)
    compare     workers side by side: values first, then CPU time in alternating order
    report      tables and JSON
    __main__    the command line
    programs    what a measured call does; processes: how a worker is started, spoken to and ended
    gpu         the same on a GPU: --suite gpu

The clock is the CPU time of a process that is held to one thread, because that changes little with what else the
machine does; wall time on a shared machine measures the neighbours. Programs that are compared run within one run,
taking turns. The best of several runs counts, and the distance of the median from it is shown as noise.
"""
