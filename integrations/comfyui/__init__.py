"""ComfyUI nodes: score pictures, compare them, keep the best, drop the bad, read the reasons.

Copy this folder into ``ComfyUI/custom_nodes/`` (and ``pip install vqr1-metric`` into ComfyUI's Python), or keep the
installed one and put a file into ``custom_nodes/`` that holds only

    from vqr1_metric.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

``example_workflows`` holds a workflow to load. Texts are shown by ComfyUI's own node Preview Any.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
