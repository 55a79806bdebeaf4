"""The callback that one would write in an evening. `python -m tools.mutants --naive tests/…` shows what the tests have to say about it.

It takes what ours takes, and does with it what first comes to mind: order 0, a teacher in whatever mode it is, with a graph, in validation
too; hooks that are placed in `before_fit` and stay; activations in the order in which layers run; adapters without steps."""
from fastai.basics import Callback
from fastcore.basics import listify
from fastkd.losses.core import Probe, as_sum
from fastkd.modules import get_module_by_name, logits
from fastkd.schedules import as_schedules, scheduled_value

__all__ = ['KnowledgeDistillationCallback']

class KnowledgeDistillationCallback(Callback):
    "Blend what a teacher says into the loss"
    order = 0
    def __init__(self, teacher, loss, activations_student=None, activations_teacher=None, weight=.5, schedule=None, task_weight=None,
        logits=logits, teacher_input=None, teacher_dtype=None, mask=None, span=None, teacher_metrics=False,
        returns='logits'):
        self.teacher, self.loss, self.weight, self.task_weight = getattr(teacher, 'model', teacher), as_sum(loss), weight, task_weight
        students, teachers = listify(activations_student), listify(activations_teacher)
        if students: self.loss = self.loss.on(students, teachers)
        self.schedule, self.fm_s, self.fm_t, self.built = as_schedules(schedule).get('weight'), {}, {}, False

    def before_fit(self):
        for part in self.loss.parts:
            for model, names, found in (self.model, part.students, self.fm_s), (self.teacher, part.teachers, self.fm_t):
                for name in names or []: self.listen(get_module_by_name(model, name), name, found)

    def listen(self, module, name, found): module.register_forward_hook(lambda module, args, output: found.update({name: output}))

    def after_loss(self):
        pred, teacher_pred = logits(self.pred), logits(self.teacher(self.x))
        if not self.built: self.loss.build(Probe(pred, teacher_pred, self.fm_s, self.fm_t, self.y))
        self.built = True
        distillation = self.loss(pred=pred, teacher_pred=teacher_pred, fm_s=self.fm_s, fm_t=self.fm_t, target=self.y)
        weight = scheduled_value(self.schedule, self.weight, self.pct_train)
        task_weight = 1 - weight if self.task_weight is None else self.task_weight
        self.learn.loss_grad = task_weight*self.loss_grad + weight*distillation
        self.learn.loss = self.loss_grad.clone()
