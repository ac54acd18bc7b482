"""Serve a model over HTTP: an API for programs, and a page for people. Stays until SIGTERM or Ctrl-C.

On this machine:
    python jobs/serve.py --model runs/train/model
On a cluster, for as long as the job runs (`serve deploy serve.yaml` is for what must last):
    ray job submit --working-dir . -- python jobs/serve.py --model s3://bucket/runs/first/model
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("serve", __doc__)
