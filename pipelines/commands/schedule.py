"""Write what runs `mone retrain` on a schedule: a Kubernetes manifest and a crontab line.

Nothing is installed; what stands behind -- goes to `mone retrain`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cluster.schedules import Schedule, crontab_line, kubernetes_manifest
from pipelines.files import write_atomically

EXAMPLE = (
    "mone schedule --image registry.example/mone:1 --out retrain.yaml -- "
    "--archive /data/incoming --recipe digits"
)


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument("--cron", default="0 3 * * *", help="five fields (default 0 3 * * *)")
    parser.add_argument("--name", default="mone-retrain", help="name of the objects")
    parser.add_argument("--namespace", default="mone")
    parser.add_argument("--image", required=True, help="container image that holds mone")
    parser.add_argument("--out", type=Path, required=True, help="manifest file to write")
    parser.add_argument("retrain", nargs="*", help="after --, arguments of `mone retrain`")
    args = parser.parse_args(arguments)
    schedule = Schedule(
        name=args.name,
        cron=args.cron,
        command=("retrain", *args.retrain),
        image=args.image,
        namespace=args.namespace,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, kubernetes_manifest(schedule).encode())
    print(f"KubeRay manifest -> {args.out}   (kubectl apply -f {args.out})")
    here = PurePosixPath(Path.cwd())
    print("crontab line for one machine:")
    print(crontab_line(schedule, workdir=here, log=here / f"{args.name}.log"))
    return 0
