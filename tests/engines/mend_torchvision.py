"""Let PyPI's torchvision, which is built for CUDA, be imported beside a CPU build of torch. Run in that environment.

Its library does not load there, so its operators are unknown and the registration of their meta versions raises. They
are declared, without any kernel, just before. Only torchvision's Python part is needed (transformers' processors).
"""

import sysconfig
from pathlib import Path

FILE = Path(sysconfig.get_paths()["purelib"], "torchvision", "_meta_registrations.py")
BEFORE = '@torch.library.register_fake("torchvision::nms")'
DECLARED = """
_declared = torch.library.Library("torchvision", "FRAGMENT")  # by fourfold's mend_torchvision.py
for _operator in ("nms", "qnms"):
    _declared.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


"""

text = FILE.read_text(encoding="utf-8")
if "_declared = " not in text:
    head, found, tail = text.partition(BEFORE)
    if not found:
        raise SystemExit(f"{FILE}: no {BEFORE}; this is another torchvision than the one that is known to need this")
    FILE.write_text(head + DECLARED + found + tail, encoding="utf-8")
