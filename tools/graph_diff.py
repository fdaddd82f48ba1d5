"""What became of the layers of one network in another: `elc-fx diff`, from a checkout.

python tools/graph_diff.py torchvision:resnet18 --input 1x3x224x224 --draw diff.html
python tools/graph_diff.py torchvision:resnet18 small/model.pt2
"""

import sys

from elc_fx.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "diff")
    main()
