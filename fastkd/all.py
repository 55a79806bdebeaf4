"Everything that a notebook user needs: `from fastkd.all import *`"
from fastkd.cache import CachedTeacher
from fastkd.callback import *
from fastkd.checkpoints import *
from fastkd.compare import Comparison, compare, sweep
from fastkd.curriculum import Curriculum, sure_of_any, sure_of_label
from fastkd.ensemble import Ensemble
from fastkd.export import OnnxModel, export_onnx, export_program, quantize_onnx
from fastkd.generations import *
from fastkd.initialisation import *
from fastkd.itself import *
from fastkd.losses.core import *
from fastkd.losses.dense import *
from fastkd.losses.feature import *
from fastkd.losses.relation import *
from fastkd.losses.response import *
from fastkd.losses.sequence import *
from fastkd.losses.supervision import *
from fastkd.losses.translators import *
from fastkd.losses.zoo import *
from fastkd.modules import *
from fastkd.mutual import *
from fastkd.plots import AgreementCallback, plot_activations
from fastkd.probabilities import *
from fastkd.report import Report, report
from fastkd.schedules import *
from fastkd.stored import StoredTeacher
from fastkd.teachers import *
from fastkd.unlabelled import Confident, Unlabelled
