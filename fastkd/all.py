"Everything that a notebook user needs: `from fastkd.all import *`"
from fastkd.cache import CachedTeacher
from fastkd.callback import *
from fastkd.checkpoints import *
from fastkd.compare import Comparison, compare, sweep
from fastkd.ensemble import Ensemble
from fastkd.losses.core import *
from fastkd.losses.dense import *
from fastkd.losses.feature import *
from fastkd.losses.relation import *
from fastkd.losses.response import *
from fastkd.losses.sequence import *
from fastkd.losses.translators import *
from fastkd.losses.zoo import *
from fastkd.modules import *
from fastkd.schedules import *
from fastkd.stored import StoredTeacher
from fastkd.teachers import *
