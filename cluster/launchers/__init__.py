"""How machines become a Ray cluster: SSH hosts, Slurm, KubeRay, compose. Each renders artefacts from one spec.

spec.py types the spec's `launch` section. cluster/launchers/node/__main__.py runs on every machine, whatever the way
in: it works out the node's network environment and supervises `ray start`. Nothing here imports Ray; it is run as a
program.
"""
