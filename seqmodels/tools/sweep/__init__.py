"""Many runs that differ in some bindings: `python -m seqmodels.tools.sweep FILE.gin --sweep_dir DIR`.

DIR/sweep.json                the points, written before anything runs
DIR/NAME/                     the run directory of a point, by train.py, and in it
DIR/NAME/point.json           what the point is: its place on every axis, its bindings, what is compared
DIR/NAME/FAILED               of a point that has failed: JSON with its exit code and its last lines
DIR/NAME/evaluations/         by seqmodels.tools.evaluate; evaluated.json beside them has the arguments of each
DIR/logs/NAME.log             what the programs of a point printed
DIR/jobs/NAME.toml            the job file of a point that goes to a pod
"""
