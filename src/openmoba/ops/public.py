"""The public functions of the operation, as `openmoba` has them; their import takes torch."""

from openmoba.ops.api import block_attention as block_attention
from openmoba.ops.api import merge_attention as merge_attention
from openmoba.ops.api import moba_attention as moba_attention
from openmoba.ops.api import moba_select as moba_select
from openmoba.ops.centroids import new_centroids as new_centroids
from openmoba.ops.decode import moba_decode as moba_decode
from openmoba.ops.explain import Explanation as Explanation
from openmoba.ops.explain import explain as explain
from openmoba.ops.paged import complete_paged as complete_paged
from openmoba.ops.paged import moba_paged as moba_paged
from openmoba.ops.paged import new_paged_centroids as new_paged_centroids
from openmoba.ops.pages import complete_pages as complete_pages
