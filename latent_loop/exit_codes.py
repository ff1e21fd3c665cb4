"""The exit codes of every program, with the table in launch/README.md: what a script may rely on."""

DONE = 0
BUG = 1  # ours: a traceback; or standard output lost its reader
BAD_INPUT = 2  # a sentence says what to correct
PREEMPTED = 10  # stopped by a signal or a time limit, saved
NON_FINITE = 11  # diverged or collapsed: the same command would come here again
HANG = 12  # nothing moved for longer than the depth explains
SAVE_FAILED = 13
PEER_LOST = 14

RESUME = (PREEMPTED, HANG, PEER_LOST)  # the same command, started again, goes on; launch/keep_going.sh does it
TOGETHER = (DONE, PREEMPTED, NON_FINITE)  # every process of a run ends with these at the same step
