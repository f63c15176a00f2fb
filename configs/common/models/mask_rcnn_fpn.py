"""
Mask R-CNN R50-FPN of the MABN paper's COCO experiments, with Detectron2's as the base: nothing frozen, a
4conv1fc box head and maskrcnn-benchmark's sampling in the RoI poolers. The experiment sets the norms.
"""

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.freeze_at = 0
model.roi_heads.box_pooler.sampling_ratio = model.roi_heads.mask_pooler.sampling_ratio = 2
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
