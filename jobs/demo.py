"""Try everything on made-up pictures: generate, train, evaluate, report. Needs no data and no download.

python jobs/demo.py
"""

from bcd import cli
from bcd.config import DemoConfig
from bcd.pipelines import demo

if __name__ == "__main__":
    cli.main(DemoConfig, demo.run, __doc__)
