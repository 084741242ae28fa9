"""How fast the operators run on a GPU, beside the Triton kernels of other libraries: --suite gpu.

    command     the command line, and what is measured in which order
    suite       processes that measure, and the rows put together from what they answer
    worker      all programs of one library, in one process (messages: what it is told and answers)
    libraries   what JAX and PyTorch do differently: placing arrays, compiling, waiting, reading the clock
    tuning      Triton's search for the fastest configuration of a kernel, on all cores
    peers       functions of other libraries, for GPUs
    report      tables and JSON

The clock is the device's time for a queue of calls: many are started before the first is waited for, so that starting
them costs nothing as long as a call takes the device longer than it takes the host. Where it does not, the time is
marked. Caches of the device are not emptied between calls: as in training, what a kernel finds there is what came
before it.

Each library has one process for all its programs, because starting one takes longer than most measurements. The two
processes share the device and take turns.
"""
