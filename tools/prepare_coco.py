"""Makes a subset of COCO 2017: chooses images by seed and fetches only those.

python tools/prepare_coco.py --train 500 --val 200 --seed 0 --out data/coco500
"""

from dropblock_det.errors import run_tool


def main() -> None:
    from dropblock_det.coco_subset.tool import prepare_coco
    from dropblock_det.commands import command

    command(prepare_coco)


if __name__ == "__main__":
    run_tool(main)
