"""Write wrong and least certain predictions for a person to look at, and read the labels back as a manifest.

On this machine:
    python jobs/triage.py --scores runs/train --output triage
    python jobs/triage.py --scores runs/train --output triage --labels triage/triage.csv
On a cluster:
    ray job submit --working-dir . -- python jobs/triage.py --scores s3://scores/2026-11 --output s3://bucket/triage
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("triage", __doc__)
