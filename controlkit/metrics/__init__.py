"""How well a picture follows its map: edges, depth, pose, regions, colours.

Every function takes numpy arrays, or what becomes one (lists, PIL images, tensors, a preprocessor's `Map`),
and returns plain numbers. What is compared is always map against map (or depth against depth, joints against
joints): the caller extracts them from the pictures with the same preprocessor.
"""

from controlkit.metrics.colours import nearest_colour as nearest_colour
from controlkit.metrics.depth import depth_rmse as depth_rmse
from controlkit.metrics.depth import depth_rmse_255 as depth_rmse_255
from controlkit.metrics.edges import EdgeScore as EdgeScore
from controlkit.metrics.edges import edge_f1 as edge_f1
from controlkit.metrics.intervals import Interval as Interval
from controlkit.metrics.intervals import interval as interval
from controlkit.metrics.intervals import mean_interval as mean_interval
from controlkit.metrics.masks import iou as iou
from controlkit.metrics.pose import oks as oks
from controlkit.metrics.pose import pck as pck
from controlkit.metrics.pose_ap import average_precision as average_precision
from controlkit.metrics.pose_ap import matches as matches
from controlkit.metrics.similarity import ms_ssim as ms_ssim
from controlkit.metrics.similarity import ssim as ssim
