"""Serve a model over HTTP: an API and a page. Runs until SIGTERM or Ctrl-C.

On this machine:
    python jobs/serve.py --model runs/train/model
On a cluster, until the job ends (for a permanent service: `serve deploy serve.yaml`):
    ray job submit --working-dir . -- python jobs/serve.py --model s3://bucket/runs/first/model
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("serve", __doc__)
