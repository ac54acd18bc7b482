"""Show a scored archive in a browser. Runs until SIGTERM or Ctrl-C.

On this machine:
    python jobs/view.py scores
On the head of a cluster, until the job ends; it asks for the token in the file:
    ray job submit --working-dir . -- python jobs/view.py s3://bucket/scores \\
        --host 0.0.0.0 --token-file /secrets/token
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("view", __doc__)
