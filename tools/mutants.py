"""Deliberate defects, and the test that notices each: what the tests are worth.

`python -m tools.mutants` applies each defect to a copy of the package and runs the test that is named for it, which must fail there and
pass without it. `python -m tools.mutants NAME …` takes those whose name has one of these words in it. `python -m tools.mutants --naive
tests/test_pairing.py …` puts the callback of `tools/naive.py` in the place of ours, and shows which tests notice."""
import os, re, shutil, sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
N_AT_ONCE, TIMEOUT, FORKS = 2, 600, get_context('forkserver') # processes; seconds

class Mutant(NamedTuple):
    "One defect"
    name: str # What is wrong, in words
    file: str # Module in fastkd/
    old: str # A piece of it that stands there once
    new: str # What stands there instead
    killed_by: str # The test that notices, in tests/: file::test, with a parameter where one is enough
    also: tuple = () # Further pairs of old and new, where one change alone does no harm

CB, LEARNED, TEACHERS, LEARNERS, TABLES, MODULES = (f'{o}.py' for o in ('callback', 'learned', 'teachers', 'learners', 'tables', 'modules'))
SAVED, MEMORY, MUTUAL, ITSELF, UNLABELLED = (f'{o}.py' for o in ('checkpoints', 'cache', 'mutual', 'itself', 'unlabelled'))
POSITIONS = 'positions.py'
CORE, RESPONSE, FEATURE, RELATION, SEQUENCE = (f'losses/{o}.py' for o in ('core', 'response', 'feature', 'relation', 'sequence'))
FORMULA = 'test_zoo.py::test_value_and_every_gradient'

TEACHER = [
    Mutant('teacher builds a graph', TEACHERS, 'evaluating(self.module), torch.no_grad(), self', 'evaluating(self.module), self',
        'test_loop_peer.py::test_teacher_builds_no_graph'),
    Mutant('teacher in inference mode', TEACHERS, 'torch.no_grad(), self._autocast()', 'torch.inference_mode(), self._autocast()',
        'test_zoo_fit.py::test_first_gradient[FitNet]'),
    Mutant('teacher in training mode', TEACHERS, 'with evaluating(self.module), torch', 'with torch',
        'test_loop_faults.py::test_plain_fit'),
    Mutant('training flags not given back', MODULES, 'finally:\n        for module in training: module.training = True',
        'finally: pass', 'test_loop_faults.py::test_plain_fit'),
    Mutant('all modules put back to training', MODULES, 'for module in model.modules() if module.training]',
        'for module in model.modules()]',
        'test_loop_faults.py::test_plain_fit'),
    Mutant("teacher's requires_grad changed", TEACHERS, 'self.captures = {} # layer',
        'module.requires_grad_(False)\n        self.captures = {} #',
        'test_loop_faults.py::test_plain_fit'),
    Mutant('teacher not reset in an epoch', CB, '= {}, 0, None\n    self._fit.teacher.reset()', '= {}, 0, None',
        'test_loop_models.py::test_recurrent_teacher_begins_anew_in_each_epoch'),
    Mutant('teacher never stops early', TEACHERS, 'can_stop = not pred and captures.counted == len(layers)', 'can_stop = False',
        'test_callback.py::test_teacher_stops_after_the_last_layer'),
    Mutant('teacher_input ignored', TEACHERS, 'if self.inputs is not None: xb = self.inputs(*xb)', 'pass',
        'test_pairing.py::test_other_statistics'),
    Mutant('only the first input reaches the teacher', TEACHERS, 'xb = xb if isinstance(xb, (tuple, list)) else (xb,)', 'xb = (xb[0],)',
        'test_loop_models.py::test_several_inputs'),
    Mutant('class permutation not applied', LEARNERS, 'logits = partial(_select, find=logits, columns=orders[0], axis=axis)', 'pass',
        'test_pairing.py::test_permuted_vocabulary'),
    Mutant('class permutation the other way round', LEARNERS, '[names_t.index(name) for name in names_s]',
        '[names_s.index(name) for name in names_t]', 'test_pairing.py::test_permuted_vocabulary'),
    Mutant('other statistics not converted', LEARNERS,
        'return [partial(renormalize, student=stats_s, teacher=stats_t, places=_images(student))]', 'return []',
        'test_pairing.py::test_other_statistics'),
    Mutant('classes of the last target for every output', LEARNERS, 'order = self.orders[place]', 'order = self.orders[-1]',
        'test_learners.py::test_each_output_by_its_own_classes'),
    Mutant('fields of the output not reordered', TEACHERS, 'activations = self.heads.fields(output, activations)', 'pass',
        'test_learners.py::test_parts_of_a_loss_compare_each_output'),
    Mutant("a table read by the student's codes", LEARNERS, 'if step is None: return []', 'return []',
        'test_learners.py::test_a_part_of_the_table'),
    Mutant("the student's substitute for a missing value", TABLES, 'torch.where(missing, self.fill, x*self.scale + self.shift)',
        'x*self.scale + self.shift', 'test_learners.py::test_a_part_of_the_table'),
    Mutant("codes of the table instead of names", TABLES, 'codes = index_t.get_indexer(index) + first_t',
        'codes = np.arange(len(index)) + first_t', 'test_learners.py::test_a_part_of_the_table'),
    Mutant('words that the teacher lacks become the first word', LEARNERS, "number.get('xxunk', number.get('#na#'))", '3',
        'test_learners.py::test_words'),
    Mutant('other classes not noticed', LEARNERS, 'if only_s or only_t or len(names_s) != len(names_t):', 'if False:',
        'test_pairing.py::test_other_vocabulary'),
    Mutant('teacher moved before `distrib_ctx` has placed the student', CB, '    fit.teacher.to(next(model.parameters()).device) #',
        '    #', 'test_loop_ranks.py::test_teacher_follows_late',
        (('        teacher = self._as_teacher()', '        teacher = self._as_teacher().to(next(self.learn.model.parameters()).device)'),)),
    Mutant("teacher's input keeps the student's precision", TEACHERS, 'if dtype is None: return xb', 'return xb',
        'test_loop_faults.py::test_teacher_of_another_dtype')]

LOOP = [
    Mutant('callback at order 0', CB, 'order, run_valid = 5, False', 'order, run_valid = 0, False',
        'test_loop_peer.py::test_blend_is_made_of_the_whole_task_loss'),
    Mutant('callback at order 10', CB, 'order, run_valid = 5, False', 'order, run_valid = 10, False',
        'test_loop_callbacks.py::test_accumulation_is_a_large_batch'),
    Mutant('valid_loss is the blend', CB, 'if self._fit is None or not self.learn.training or', 'if self._fit is None or',
        'test_loop_peer.py::test_valid_loss_is_the_task_loss', (('run_valid = 5, False', 'run_valid = 5, True'),)),
    Mutant('teacher runs in validation', CB, 'not self.learn.training or self.learn.lock.locked() or not len', 'not len',
        'test_loop_inference.py::test_teacher_does_not_run_in_validation', (('order, run_valid = 5, False', 'order = 5'),)),
    Mutant('weight 0 touches the loss', CB, 'if weight > 0 or task_weight != 1:\n        learn.loss_grad',
        'if True:\n        learn.loss_grad',
        'test_loop_peer.py::test_weight_zero_leaves_the_loss_alone'),
    Mutant('task_weight ignored', CB, 'return 1 - weight if self.task_weight is None else self.task_weight', 'return 1 - weight',
        'test_callback.py::test_task_weight'),
    Mutant('task loss at full weight', CB, 'return 1 - weight if self.task_weight is None else self.task_weight', 'return 1.',
        'test_loop_fits.py::test_fit'),
    Mutant('train_loss is the task loss', CB, '        learn.loss = learn.loss_grad.detach().clone()\n', '',
        'test_callback.py::test_train_loss_is_the_blend'),
    Mutant('errors come out of after_loss', CB, 'try: self._blend()\n    except Exception as e: self._fit.problem = e', 'self._blend()',
        'test_loop_callbacks.py::test_a_failing_loss_leaves_autocast_off'),
    Mutant('hooks kept after a fit', CB, 'if fit is not None and fit.captures is not None: fit.captures.remove()', 'pass',
        'test_loop_faults.py::test_cleanup_by_hand'),
    Mutant('hooks never taken off', MODULES, 'for handle in self.handles: handle.remove()', 'pass',
        'test_modules.py::test_hooks_are_gone_after_errors'),
    Mutant('hooks stay after a cancelled epoch', CB, "for _event in ('after_cancel_train', 'after_cancel_epoch'):", 'for _event in ():',
        'test_loop_faults.py::test_cancelled_training_leaves_no_hook_for_validation'),
    Mutant('no clean-up when fit takes the callback off', CB, 'if learn is None: self.cleanup()', 'pass',
        'test_loop_faults.py::test_raised_by_another_callback'),
    Mutant('columns kept', CB, "filter(lambda metric: getattr(metric, 'cb', None) is not self)", 'filter(lambda metric: True)',
        'test_loop_faults.py::test_plain_fit'),
    Mutant('columns never start anew', CB, 'self._fit.sums, self._fit.n_batches, self._fit.blamed = {}, 0, None', 'pass',
        'test_callback.py::test_columns'),
    Mutant('column shows the weighted distillation loss', CB, 'distillation_loss=distillation)', 'distillation_loss=weight*distillation)',
        'test_zoo_fit.py::test_first_gradient[SoftTarget]'),
    Mutant('recorded task loss is scaled in place', CB, 'self.learn.loss_grad.clone() #', 'self.learn.loss_grad #',
        'test_loop_peer.py::test_recorded_values_are_copies'),
    Mutant('recorded values keep their graph', CB, 'torch.as_tensor(value).detach() for', 'torch.as_tensor(value) for',
        'test_loop_peer.py::test_recorded_values_are_copies'),
    Mutant('validation within a fit starts anew', CB, 'if locked or self.teacher is None: return', 'if self.teacher is None: return',
        'test_loop_callbacks.py::test_validation_within_a_fit'),
    Mutant('validation within a fit ends it', CB, 'if fit is None or self.learn.lock.locked(): return', 'if fit is None: return',
        'test_loop_callbacks.py::test_validation_within_a_fit'),
    Mutant('masks ignored', CB, "self._mask() if 'mask' in fit.wants else None", 'None',
        'test_zoo_fit.py::test_first_gradient[HiddenStates]'),
    Mutant("the user's mask ignored", CB, 'if self.mask is not None:\n        try: return', 'if False:\n        try: return',
        'test_callback.py::test_sequences_count_where_labels_do'),
    Mutant('ignore_index ignored', CB, 'ignored = next((o for o in ignored if o is not None), None)', 'ignored = None',
        'test_losses_sequence.py::test_ignored_labels_are_left_out'),
    Mutant('class axis ignored', CB, "getattr(self._task_loss_func(), 'axis', 1)", '1',
        'test_callback.py::test_sequences_count_where_labels_do'),
    Mutant('mixed batches have plain labels', CB, 'return labels(self.learn.yb) if mix is None else',
        'return labels(self.learn.yb) if True else', 'test_loop_callbacks.py::test_mixup_blends_both_labels'),
    Mutant('labels of tables keep their dimension', CORE, 'target.shape[axis] == 1: target = target.squeeze(axis)', 'False: pass',
        'test_loop_models.py::test_judges_a_table'),
    Mutant('index shifted by one', POSITIONS, 'self.noted.append(i)', 'self.noted.append(i + 1)',
        'test_callback.py::test_positions_in_the_dataset[0]'),
    Mutant('the sample that was asked for is noted, and not the one that came', POSITIONS, 'self.noted or [s]*(item is s)', '[s]',
        'test_positions.py::test_what_is_read_is_noted'),
    Mutant('what is made anew has positions without a trial', POSITIONS, "if places is not None and by_fastai: return True",
        "if by_fastai: return True", 'test_positions.py::test_refused[before_batch]'),
    Mutant('bytes of a size of 1 or 0 are read by its stride', 'shared.py', 'tensor.as_strided((tensor.numel(),), (1,))',
        'tensor.reshape(-1)', 'test_description.py::test_arrays_of_any_kind'),
    Mutant('samples that are sorted keep their positions', POSITIONS, '[slice(None) if places is None else places]', '',
        'test_positions.py::test_told[by_number]'),
    Mutant('whatever collates keeps the order', POSITIONS, 'if places is not None and by_fastai: return True', 'return True',
        'test_positions.py::test_refused[collate_sorted]'),
    Mutant('a curriculum counts samples', 'curriculum.py', 'return index[values.argsort(descending=True, stable=True)]',
        'return values.argsort(descending=True, stable=True)', 'test_curriculum.py::test_samples_that_are_skipped'),
    Mutant('probe moves the random state', CB, 'with no_random(reproducible=False), autocast:', 'with autocast:',
        'test_loop_peer.py::test_probe_leaves_random_states_alone'),
    Mutant('probe moves batch statistics', CB, 'with evaluating(model), torch.no_grad(), fit.captures, _on_sample',
        'with torch.no_grad(), fit.captures, _on_sample', 'test_callback.py::test_weight_zero[response-plain]'),
    Mutant('probe leaves a recurrent state', CB, '    reset_state(model)\n    fit.teacher', '    fit.teacher',
        'test_loop_models.py::test_language_model_with_weight_zero'),
    Mutant('check of the first answer removed', CB, '    self._check_finite(teacher_pred, fm_t)\n', '',
        'test_loop_faults.py::test_a_teacher_that_is_broken'),
    Mutant('check of later answers removed', CB, 'if weight > 0: self._watch(distillation, given)', 'pass',
        'test_loop_faults.py::test_a_teacher_that_breaks[SoftTarget]'),
    Mutant('a GPU notices no teacher that breaks', CB, 'if fit.blamed is not None and fit.blamed:', 'if False:',
        'test_loop_faults.py::test_a_teacher_that_breaks_on_a_device'),
    Mutant('student may be its own teacher', CB, '    if shared: raise ValueError', '    if False: raise ValueError',
        'test_pairing.py::test_teacher_is_the_student'),
    Mutant('layers that do not run are not missed', CB, 'if missing := [name for name in self._fit.students if name not in fm_s]: raise',
        'if missing := []: raise', 'test_loop_faults.py::test_layer_that_never_runs[student]'),
    Mutant('settings not checked', CB, 'self._check_settings()\n', 'pass\n', 'test_pairing.py::test_settings'),
    Mutant('advice in every fit', CB, 'if key not in self._warned: warnings', 'if True: warnings',
        'test_callback.py::test_advice_is_given_once'),
    Mutant('no advice on labels that coexist', CB,
        "    said |= classes_that_coexist(given['target'], given['teacher_pred'], self.loss, self._fit.axis)\n", '',
        'test_callback.py::test_labels_that_coexist[SoftTarget-False]'),
    Mutant('no advice on parts that are too quiet', CB,
        'if weight > 0 and not teacher.starts_silent and not _is_compiled(self.learn.model):', 'if False:',
        'test_callback.py::test_attention_at_half_on_resnets'),
    Mutant('no advice on a teacher at chance', CB,
        "said['chance'] = teacher_at_chance(given['teacher_pred'], given['target'], self._mask(), self._fit.axis)", 'pass',
        'test_callback.py::test_advice_is_given_once'),
    Mutant('a class that the teacher rules out is an error', CB, '(value.isnan() | (value == math.inf)).any()',
        'not value.isfinite().all()', 'test_callback.py::test_teacher_that_rules_out_a_class'),
    Mutant('`#2` lost', CB, "return next(o for o in ('', *(f'#{i + 2}' for i in range(len(taken)))) if o not in taken)", "return ''",
        'test_loop_fits.py::test_two_callbacks'),
    Mutant('recorded values of the fit before stay', CB, "if hasattr(learn, 'recorder') and not fit.suffix:",
        "if not hasattr(learn.recorder, 'distillation'):", 'test_loop_fits.py::test_two_callbacks'),
    Mutant('columns of training stand under validation, too', CB, 'name not in self._fit.sums or of_validation:',
        'name not in self._fit.sums:', 'test_loop_callbacks.py::test_train_metrics'),
    Mutant('empty batches are compared', CB, 'return not any(isinstance(x, Tensor) and x.shape[:1] == (0,) for x in self.learn.xb)',
        'return True', 'test_loop_faults.py::test_empty_batch[1]'),
    Mutant('batches without labels are compared', CB, 'self.learn.lock.locked() or not len(self.learn.yb)', 'self.learn.lock.locked()',
        'test_loop_faults.py::test_batches_without_labels'),
    Mutant('the student that was there first is heard', CB, '    self._fit.captures.model = unwrap_model(self.learn.model) #', '    #',
        'test_loop_compression.py::test_replaced_model'),
    Mutant('compiled code of an earlier fit is kept', CB, 'if any(map(_is_compiled, [self.learn.model, *teacher.modules()])): torch',
        'if False: torch', 'test_loop_models.py::test_compiled_student[eager-True]'),
    Mutant('DataParallel over several devices goes on', CB, 'if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:',
        'if False:', 'test_loop_models.py::test_data_parallel_over_several'),
    Mutant('a span is over after its epochs', CB, 'if self.span and self._epochs_done >= self.span: self._epochs_done = 0', 'pass',
        'test_loop_fits.py::test_fine_tune_with_span'),
    Mutant('span ignored', CB, 'if self.span: pct =', 'if False: pct =', 'test_resume.py::test_resume_of_a_span'),
    Mutant('schedules ignored', CB, '{name: float(scheduled_value(curve, self.weight, min(max(pct, 0.), 1.))) for',
        '{name: self.weight for',
        'test_callback.py::test_schedule_of_a_temperature_and_of_parts'),
    Mutant('schedule with a hidden state', 'schedules.py', 'if pct_train < self.start_pct: return self.start_val',
        "if pct_train < vars(self).setdefault('seen', pct_train): return self.end_val", 'test_schedules.py::test_no_hidden_state'),
    Mutant('export ships the teacher', CB, 'left_behind = dict(teacher=None, ', 'left_behind = dict(',
        'test_loop_inference.py::test_export_is_as_small_as_without'),
    Mutant('a copy keeps the teacher', CB, 'left_behind = dict(teacher=None, ', 'left_behind = dict(',
        'test_loop_inference.py::test_copied_callback[deepcopy]'),
    Mutant('a copy keeps what was learned', CB, "'loss': self.loss.without_learned()}", "'loss': self.loss}",
        'test_loop_inference.py::test_copied_callback[deepcopy]')]

CHECKPOINTS = [
    Mutant('checkpoint forgets random states', SAVED, 'if not rank_distrib(): _set_random_states', 'if False: _set_random_states',
        'test_loop_inference.py::test_going_on[fitnet]'),
    Mutant('checkpoint forgets how samples are shuffled', SAVED, "if rng is not None: loader.rng.setstate", "if False: loader.rng.setstate",
        'test_loop_inference.py::test_going_on[fitnet]'),
    Mutant('checkpoint forgets the callbacks', SAVED, "in zip(cbs, state['callbacks']): cb.load_state_dict(saved)", "in (): pass",
        'test_loop_inference.py::test_checkpoint_of_two_callbacks'),
    Mutant('callbacks get the state of the first', SAVED, "zip(cbs, state['callbacks']): cb",
        "zip(cbs, state['callbacks'][:1]*len(cbs)): cb", 'test_loop_inference.py::test_checkpoint_of_two_callbacks'),
    Mutant('checkpoint loses an epoch', SAVED, 'epochs_done=self.epoch + 1)', 'epochs_done=self.epoch)',
        'test_loop_inference.py::test_going_on[fitnet]'),
    Mutant('checkpoint is written in place', 'shared.py', "part = file.with_name(f'{file.name}.{uuid4().hex}.part')", 'part = file',
        'test_loop_inference.py::test_a_checkpoint_that_is_cut_off'),
    Mutant('every process writes a checkpoint', SAVED, '    if rank_distrib(): return file\n', '',
        'test_loop_inference.py::test_only_the_first_process_writes'),
    Mutant('skipped epochs are saved', SAVED, 'if not self.trained or self._is_a_look()', 'if self._is_a_look()',
        'test_loop_inference.py::test_checkpoint_of_each_epoch'),
    Mutant('lr_find is saved', SAVED, "self.learn.lock.locked() or hasattr(self.learn, 'lr_finder')",
        'self.learn.lock.locked()', 'test_loop_inference.py::test_no_checkpoint_of_a_look'),
    Mutant('checkpoint is half loaded', SAVED, "_check_model(file, content['model']", "(lambda *args: None)(file, content['model']",
        'test_checkpoints.py::test_another_model[fresh]'),
    Mutant('any optimizer is taken for the one that was saved', SAVED, "if saved['optimizer'] != here['optimizer']", 'if False',
        'test_checkpoints.py::test_optimizers_that_are_nearly_the_same'),
    Mutant('another order of parameters is taken for the one that was saved', SAVED,
        "if there != now: raise ValueError(f'{file.name} holds other", "if False: raise ValueError(f'{file.name} holds other",
        'test_checkpoints.py::test_other_groups[fresh]'),
    Mutant('what a callback wrote over stays', SAVED, 'with suppress(Exception): cb.load_state_dict(state)', 'pass',
        'test_checkpoints.py::test_a_callback_that_fails[adam-fresh]'),
    Mutant('check sums are not looked at', SAVED, 'damaged = archive.testzip()', 'damaged = None',
        'test_checkpoints.py::test_a_damaged_file'),
    Mutant('a run writes over another', SAVED, '_run_of(file) not in _runs(learn)', "_run_of(file) == ''",
        'test_checkpoints.py::test_another_run_is_not_written_over'),
    Mutant('flags of a torch optimizer are forgotten', 'optimizers.py', 'if flags is not None: opt.state', 'if False: opt.state',
        'test_checkpoints.py::test_flags_of_fastai'),
    Mutant('gradients that wait are forgotten', SAVED, "set_gradients(params, state['grads'])", 'pass',
        'test_checkpoints.py::test_the_middle_of_a_step'),
    Mutant('gradients of adapters that wait are forgotten', LEARNED, 'set_gradients(dict(enumerate(self.params)), grads)', 'pass',
        'test_checkpoints.py::test_the_middle_of_a_step'),
    Mutant('the loss scale begins anew', SAVED, "if scaler and self.state['scaler']: scaler", 'if False: scaler',
        'test_checkpoints.py::test_a_new_fit_has_a_new_scale')]

PROCESSES = [ # each of these starts two processes
    Mutant('columns not averaged', LEARNED, 'if _distributed(): dist.all_reduce(values.div_', 'if False: dist.all_reduce(values.div_',
        'test_loop_ranks.py::test_columns[forked]'),
    Mutant('processes train adapters of their own', LEARNED, '    if _distributed():\n        for p in self.params:',
        '    if False:\n        for p in self.params:', 'test_loop_ranks.py::test_adapters_and_schedules[forked]'),
    Mutant('processes start with adapters of their own', LEARNED, 'if not _distributed(): return\n    for tensor in (*loss.parameters()',
        'return\n    for tensor in (*loss.parameters()', 'test_loop_ranks.py::test_adapters_and_schedules[forked]'),
    Mutant("means of adapters' batch norms differ between processes", LEARNED, 'if not _distributed(): return\n    for norm in',
        'return\n    for norm in', 'test_loop_ranks.py::test_statistics_of_adapters[forked]')]

ADAPTERS = [
    Mutant('adapters not trained', CB, 'self._learned.step(self.learn)', 'pass', 'test_resume.py::test_adapter_alone_learns'),
    Mutant('adapters not saved', CB, 'dict(loss=self.loss.state_dict(), opt=opt', 'dict(loss={}, opt=opt',
        'test_resume.py::test_resume[in_memory-fitnet]'),
    Mutant("state of the adapters' optimizer not saved", CB, 'opt = None if self._learned is None else self._learned.state_dict()',
        'opt = None', 'test_resume.py::test_resume[in_memory-fitnet]'),
    Mutant("adapters' optimizer made anew in each fit", LEARNED, 'return opt is self.of or any(', 'return False and any(',
        'test_loop_fits.py::test_fit_twice[fitnet]'),
    Mutant('lr_find leaves adapters trained', CB, "if hasattr(self.learn, 'lr_finder'): self._fit.before = self.state_dict()", 'pass',
        'test_loop_fits.py::test_lr_find[fitnet-1]'),
    Mutant('adapters step at the scaled gradient', LEARNED, 'scaler = scaler_of(learn)', 'scaler = None',
        'test_loop_callbacks.py::test_mixed_precision'),
    Mutant('adapters use the scaler of a fit that was interrupted', LEARNED, "return getattr(learn, 'scaler', None) if any(",
        "return getattr(learn, 'scaler', None) if True or any(", 'test_resume.py::test_scaler_of_an_interrupted_fit'),
    Mutant('adapters clipped before they are unscaled', LEARNED, 'if scaler is not None: scaler.unscale_(self.opt)', 'pass',
        'test_resume.py::test_clip_in_half_precision'),
    Mutant('adapters take a step that the student skips', CB, 'if self._learned is not None: self._learned.skip = True', 'pass',
        'test_resume.py::test_a_cancelled_step_is_no_step'),
    Mutant('adapters step while gradients accumulate', CB, 'def after_step(self', 'def after_backward(self',
        'test_loop_callbacks.py::test_accumulation_is_a_large_batch[plain]'),
    Mutant('clipping ignores adapters', LEARNED, 'if isinstance(cb, GradientClip): nn', 'if False: nn',
        'test_loop_callbacks.py::test_clip'),
    Mutant("adapters' gradients add up over steps", LEARNED, '        self.opt.zero_grad()\n', '',
        'test_resume.py::test_gradients_start_anew'),
    Mutant('adapters learn at a constant rate', LEARNED, 'if is_number and name in self.opt.hypers[0]: self', 'if False: self',
        'test_loop_fits.py::test_fit_one_cycle_with_slices'),
    Mutant('adapters follow the first group', LEARNED, 'in learn.opt.hypers[-1].items():', 'in learn.opt.hypers[0].items():',
        'test_loop_fits.py::test_fit_one_cycle_with_slices'),
    Mutant("adapters move the student's random state", CORE, 'with torch.random.fork_rng(devices=[]):', 'if True:',
        'test_sums.py::test_build_leaves_generators_alone'),
    Mutant('two parts start with equal adapters', CORE, '(torch.initial_seed() + 0x5eed + stream)', '(torch.initial_seed() + 0x5eed)',
        'test_sums.py::test_parts_start_with_numbers_of_their_own'),
    Mutant('adapters made anew by each build', CORE, '    if self.learned is None:\n        with', '    if True:\n        with',
        'test_sums.py::test_adapters_are_made_once'),
    Mutant('adapters skipped', CORE, 'if adapter is not None: student = adapter(student)', 'pass', 'test_losses.py::test_fitnet_adapter')]

ACTIVATIONS = [
    Mutant('pairs in forward order', CORE, 'return {key: activations[name] for key, name in zip(keys, names)}',
        'return dict(zip(keys, (activations[name] for name in activations if name in names)))', 'test_pairing.py::test_declared_order'),
    Mutant('activations in forward order', MODULES, 'for name in self.names:\n        if name in self.stored:',
        'for name in [*self.stored, *self.names]:\n        if name in self.stored:',
        'test_modules.py::test_repeated_layers_share_an_entry'),
    Mutant('unequal lists cut silently', CORE, 'return [(i, i) for i in range(n_s)]', 'return [(i, i) for i in range(min(n_s, n_t))]',
        'test_pairing.py::test_unequal_lists', (("if n_s != n_t: raise ValueError(f'{self}: {n_s} stu", "if 0: raise ValueError(f'"),)),
    Mutant('activation overwritten by the next layer', MODULES, 'copied = torch.compiler.is_compiling() or', 'copied = False and',
        'test_modules.py::test_in_place_successors', (('if overwritten and value is original:', 'if False:'),)),
    Mutant('hooks listen to copies of the model', MODULES, 'is not None and module is self.module: self', 'is not None: self',
        'test_modules.py::test_replicas_do_not_write_into_the_original'),
    Mutant('copied hooks write into the original', MODULES, 'def __getstate__(self): return {} #',
        'def __getstate__(self): return self.__dict__ #',
        'test_modules.py::test_copies_do_not_write_into_the_original'),
    Mutant('activations kept after they were taken', MODULES, '    self.clear()\n    return taken', '    return taken',
        'test_modules.py::test_no_graph_is_kept_alive')]

LOSSES = [
    Mutant('T² lost', RESPONSE, 'return self.T**2 * kl_rows(student, teacher, self.T)', 'return kl_rows(student, teacher, self.T)',
        'test_losses.py::test_soft_target'),
    Mutant('KL the other way round', RESPONSE, 'return kl_of_logs(log_probs(student, T), finite(log_probs(teacher, T)))',
        'return kl_of_logs(finite(log_probs(teacher, T)), log_probs(student, T))', 'test_losses.py::test_soft_target'),
    Mutant('mean over classes instead of their sum', RESPONSE, "reduction='none', log_target=True).sum(1)",
        "reduction='none', log_target=True).mean(1)", 'test_losses.py::test_soft_target'),
    Mutant('DecoupledKD swaps alpha and beta', RESPONSE, 'self.alpha*kl_rows(two_s, two_t) + self.beta*kl',
        'self.beta*kl_rows(two_s, two_t) + self.alpha*kl',
        f'{FORMULA}[DecoupledKD(T=4, alpha=1.0, beta=8.0) classes-0]'),
    Mutant('DecoupledKD counts the target among the others', RESPONSE, 'logits = logits.masked_fill(is_target, -math.inf)',
        'pass',
        'test_losses_response.py::test_the_target_is_no_other'),
    Mutant('DIST without its columns', RESPONSE, ' + self.gamma*decorrelation(log_s, log_t, 0, mask)', '',
        f'{FORMULA}[DIST(beta=1.0, gamma=1.0, T=1.0)-0]'),
    Mutant('Attention without normalisation', FEATURE, 'return unit(size.mean(1).flatten(1))',
        'return size.mean(1).flatten(1)', 'test_losses.py::test_attention'),
    Mutant('FitNet adds instead of averaging', FEATURE, 'unit(student), unit(teacher)\n        return F.mse_loss(student, teacher)',
        "unit(student), unit(teacher)\n        return F.mse_loss(student, teacher, reduction='sum')",
        'test_losses.py::test_fitnet'),
    Mutant('maps are not pooled to the smaller', CORE, 'size = [min(sizes) for', 'size = [max(sizes) for', 'test_losses.py::test_fitnet'),
    Mutant('channels-last maps taken as they are', CORE, 'if square and activation.ndim == 4 and', 'if False and',
        'test_losses.py::test_pictures_that_are_not_square'),
    Mutant('PKT without eps', RELATION, '((p_t + self.eps).log() - (p_s + self.eps).log())', '(p_t.log() - p_s.log())',
        'test_losses.py::test_pkt'),
    Mutant('PKT at kernel −1 to 1', RELATION, 'cosines(rows).add_(1)', 'cosines(rows)',
        'test_losses.py::test_pkt'),
    Mutant('Distances pull one of each pair only', RELATION, 'pull = pull + pull.T', 'pass',
        f'{FORMULA}[InstanceGraph(edges=3, vertices=0)-0]'),
    Mutant('Attention maps have a gradient at 0', SEQUENCE, 'where_lifted_0(ratio, student)', 'ratio',
        'test_zoo.py::test_flat_inputs'),
    Mutant('RKD without its scale', RELATION, 'return rescaled(d, d.sum()/(d > 0).sum().clamp(min=1))', 'return d',
        f'{FORMULA}[RKD(distance=25.0, angle=50.0)-0]'),
    Mutant('autocast on inside a loss', CORE, 'if not torch.is_autocast_enabled(device): return', 'return',
        'test_losses.py::test_half_precision'),
    Mutant('half precision stays half', CORE,
        'full = inputs.float() if inputs.dtype in _HALF and inputs.numel() <= most else inputs', 'full = inputs',
        'test_losses.py::test_half_precision'),
    Mutant('float64 is cut to float32', CORE,
        'inputs.float() if inputs.dtype in _HALF and inputs.numel() <= most else inputs',
        'inputs.float() if inputs.is_floating_point() else inputs', 'test_losses.py::test_float64_stays'),
    Mutant('mask has no say', CORE, 'return mean_by_chunks(self, None if mask is None else fit_mask(mask, row_shape(pred, axis)), *rows)',
        'return mean_by_chunks(self, None, *rows)', 'test_losses.py::test_mask'),
    Mutant('mean over all positions of a prediction, masked ones too', CORE, 'values = [o[mask] for o in values]',
        'values = [o*mask.view(-1, 1) for o in values]', 'test_losses.py::test_mask'),
    Mutant('masked rows count on a GPU', CORE, '(n_all*mean(*filled) - (n_all - n)*mean(*instead))/n.clamp(min=1)',
        'mean(*filled)', 'test_losses_response.py::test_a_mask_leaves_positions_out'),
    Mutant('masked rows have a say in relations between rows on a GPU', CORE, 'if not rows_alone: return mean(*filled, mask)',
        'if not rows_alone: return mean(*filled)', 'test_losses_response.py::test_a_mask_leaves_positions_out'),
    Mutant('a class that the teacher rules out makes a loss infinite', RESPONSE, 'finite(log_probs(teacher, T))', 'log_probs(teacher, T)',
        'test_losses_response.py::test_classes_that_the_teacher_rules_out'),
    Mutant('mean over all positions, masked ones too', CORE, '.sum()/mask.sum().clamp(min=1)', '.sum()/len(mask)',
        'test_losses.py::test_rows'),
    Mutant('classes expected in dimension 1', CORE, 'if axis not in (-1, values.ndim - 1): values = values.movedim(axis, -1)',
        'if values.ndim > 2: values = values.movedim(1, -1)',
        'test_losses.py::test_sequences'),
    Mutant('lam dropped', CORE, 'if len(values) > 1 else values[0], known)', 'if False else values[0], known)',
        'test_losses.py::test_labels'),
    Mutant('lam the other way round', CORE, 'torch.lerp(values[-1], values[0], lam', 'torch.lerp(values[0], values[-1], lam',
        'test_losses.py::test_labels'),
    Mutant('labels that are no classes count', CORE, 'else values[0], known)', 'else values[0], mask)',
        'test_losses_response.py::test_labels_that_are_no_classes_do_not_count'),
    Mutant('factors ignored', CORE, 'sum(part.factor*values[part.name] for', 'sum(values[part.name] for', 'test_sums.py::test_factors'),
    Mutant('scheduled settings not given back', CORE, 'zip(places, before): setattr(owner, name, value)', 'zip(places, before): pass',
        'test_sums.py::test_setting_is_undone_after_errors'),
    Mutant('settings not checked in losses', CORE, '        self.check_setting(name, value)\n        super().__setattr__',
        '        super().__setattr__',
        'test_losses.py::test_settings_out_of_range')]

SCHEMES = [ # who teaches whom
    Mutant('all parts hear the mean of an ensemble', CORE, 'if name in self.wants and layer is not None:', 'if False:',
        'test_sums.py::test_prediction_of_a_layer'),
    Mutant('what a teacher hears has a graph', CB, 'student_pred=pred.detach', 'student_pred=lambda: pred',
        'test_ensemble.py::test_a_teacher_that_hears_the_student[alone]'),
    Mutant('a peer listens to itself', MUTUAL, "'predictions.') and layer != own", "'predictions.')",
        'test_mutual.py::test_one_step_by_hand'),
    Mutant('the ensemble learns in the place of the peers', MUTUAL,
        'torch.stack([loss_func(pred, *yb) for pred in self._labelled(preds)]).mean()', 'loss_func(pred, *yb)',
        'test_mutual.py::test_one_step_by_hand'),
    Mutant('peers get a share of their gradient', MUTUAL, 'self.learn.loss_grad*len(unwrap_model(self.learn.model).students)',
        'self.learn.loss_grad', 'test_mutual.py::test_weight_zero'),
    Mutant('the mean teacher has no statistics', ITSELF, 'now.lerp_(mean, decay)', 'pass', 'test_itself.py::test_mean_of_states'),
    Mutant('each view hears itself', ITSELF, 'rows.unflatten(0, (-1, 2)).flip(1)', 'rows.unflatten(0, (-1, 2))',
        'test_itself.py::test_other_view_by_hand'),
    Mutant('unlabelled samples in the task loss', UNLABELLED, 'return output[:n] if', 'return output if',
        'test_unlabelled.py::test_each_loss_by_hand'),
    Mutant('unsure pseudo labels count', UNLABELLED, '.amax(axis) >= self.least', '.amax(axis) >= 0.',
        'test_unlabelled.py::test_confident_by_hand'),
    Mutant('generations train again', 'generations.py', 'if file and file.exists():', 'if False:', 'test_generations.py::test_killed')]

CACHE = [ # what is remembered
    Mutant('some bits do not count', MEMORY, 'else row[0], digest', 'else row[0][:16], digest', 'test_cache.py::test_neighbours_differ'),
    Mutant('a cache mixes up its rows', MEMORY, 'merged[known], merged[new] = rows, fresh',
        'merged[known], merged[new] = rows.flip(0), fresh', 'test_cache.py::test_against_a_model_in_memory'),
    Mutant('other weights, same answers', MEMORY, 'self.versions, self.epoch_start, self.n_epoch = None,',
        'self.versions, self.epoch_start, self.n_epoch = self.versions,', 'test_cache.py::test_weights_changed_out_of_sight'),
    Mutant('a cache knows no limit', MEMORY, 'self.n_bytes > self.max_bytes: self', 'False: self', 'test_cache.py::test_oldest_out_first')]

D, WHAT = 'description.py', 'test_description.py::'
KNOWN = [ # what an experiment was made of, and which candidate was best
    Mutant('sets are described in their order', D, 'return sorted(map(description, o))', 'return [*map(description, o)]',
        f'{WHAT}test_processes'),
    Mutant('inner functions are not seen', D, 'o.argval for code in _codes(func.__code__)', 'o.argval for code in [func.__code__]',
        'test_compare.py::test_description_of_what_is_named'),
    Mutant('defaults are not described', D, 'o.__defaults__, o.__kwdefaults__', 'None, None', f'{WHAT}test_differences[defaults]'),
    Mutant('bases and members of classes are not described', D, "    return o.__bases__, {", "    return o.__qualname__, not {",
        f'{WHAT}test_differences[class_bodies]'),
    Mutant('layers inside a model are not described', D, 'modules=o._modules', 'modules=None',
        f'{WHAT}test_differences[own_layers_inside]'),
    Mutant('datasets are looked into', D, 'Dataset, torch.utils.data.DataLoader), _of_data', 'torch.utils.data.DataLoader), _of_data',
        f'{WHAT}test_samples_are_not_looked_into'),
    Mutant('references are numbers', D, "f'#{numbers.setdefault(id(part), len(numbers))}'", 'numbers.setdefault(id(part), len(numbers))',
        f'{WHAT}test_differences[references]'),
    Mutant('transforms are not described', D, '(Pipeline, lambda o: [*o.fs])', '(Pipeline, lambda o: [])',
        f'{WHAT}test_differences[augmentation]'),
    Mutant('numbers that transforms drew are described', D, 'isinstance(o, (Callback, Metric, Transform))',
        'isinstance(o, (Callback, Metric))', f'{WHAT}test_what_runs_does_not_count'),
    Mutant('candidates are judged by the direction of another metric', 'compare.py', '_direction(candidates[ALONE][0], None, True), None',
        'lower_is_better, None', 'test_compare.py::test_a_direction_is_that_of_its_metric'),
    Mutant('other loaders shuffle as they like', 'compare.py', 'for dl in self.learn.dls.loaders: self.begin(dl)',
        'pass', 'test_compare.py::test_loaders_that_a_fit_brings'),
    Mutant('generators of loaders are not given back', 'shared.py', 'for o, before in states: o.set_state(before)', 'pass',
        'test_compare.py::test_loaders_of_torch'),
    Mutant('loaders of torch draw from what dropout draws from', 'shared.py', 'for o in bare: o.generator = torch.Generator()', 'pass',
        'test_compare.py::test_torch_loaders_shuffle_alike'),
    Mutant('what a set-up draws reaches dropout', 'compare.py', 'set_seed(seed + 0x5eed)', 'pass',
        'test_compare.py::test_a_set_up_that_draws_numbers_leaves_dropout_alone'),
    Mutant('callbacks forget in a report', 'report.py', '*learn.metrics, *learn.cbs,', '*learn.metrics,',
        'test_report.py::test_callbacks_keep_what_they_hold'),
    Mutant('other metrics are compared', 'compare.py', '!= (expected or name)', '!= name',
        'test_compare.py::test_metrics_that_are_not_the_same[another]'),
    Mutant('fused operations are not counted', 'report.py', 'if fused: torch.backends.mkldnn.enabled = False', 'if False: pass',
        'test_report.py::test_recurrent_costs')]

MUTANTS = TEACHER + LOOP + CHECKPOINTS + PROCESSES + ADAPTERS + ACTIVATIONS + LOSSES + SCHEMES + CACHE + KNOWN

# ---- Running them: each in a copy of the project, in a process of its own that finds torch and fastai imported

def mutated(mutant):
    "The module's source with the defect; a ValueError where a piece of it does not stand there exactly once"
    source = (ROOT/'fastkd'/mutant.file).read_text()
    for old, new in ((mutant.old, mutant.new), *mutant.also):
        if (n := source.count(old)) != 1: raise ValueError(f'{mutant.name}: {n} times in {mutant.file}: {old!r}')
        source = source.replace(old, new)
    return source

def run_in(folder, tests):
    "What pytest returns for `tests` of the copy in `folder`, which holds what it prints, too"
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    with open('out.txt', 'w') as out:
        for stream in 1, 2: os.dup2(out.fileno(), stream)
        sys.stdout = sys.stderr = out
        import pytest
        options = ['-p', 'no:cacheprovider', '-p', 'no:xdist', '-q', '-rA', '--tb=line', '--no-header', '-W', 'ignore']
        code = int(pytest.main([*options, *tests]))
        import fastkd
        assert Path(fastkd.__file__).is_relative_to(folder)
    sys.exit(code)

def tested(sources, tests):
    "Run `tests` in a copy of the project that has other `sources`, by name of the module; what pytest returns and prints"
    with TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in ('fastkd', 'tests', 'examples'): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT/'pyproject.toml', copy)
        for file, source in sources.items(): (copy/'fastkd'/file).write_text(source)
        process = FORKS.Process(target=run_in, args=(str(copy), tests))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive(): process.kill()
        process.join()
        return process.exitcode, (copy/'out.txt').read_text()

def result(mutant):
    "What became of a mutant: the named test fails with it, and not because nothing could be imported"
    try: code, out = tested({mutant.file: mutated(mutant)}, ['-x', f'tests/{mutant.killed_by}'])
    except ValueError as e: return f'STALE: {e}'
    return {0: 'SURVIVED', 1: 'killed', -9: 'killed: it hangs'}.get(code, f'NOT RUN: {out[-400:]}')

def lines_of(out): return re.findall(r'^(PASSED|FAILED|ERROR) (tests/.*?)(?: - .*)?$', out, re.M)

def baseline(mutants):
    "The named tests that fail without a mutant; pytest's own words where they could not run"
    code, out = tested({}, sorted({f'tests/{o.killed_by}' for o in mutants}))
    if code in (0, 1): return [f'{test} fails without a mutant' for verdict, test in lines_of(out) if verdict != 'PASSED']
    return [out[-2000:]]

def main(words):
    chosen = [o for o in MUTANTS if not words or any(word in o.name for word in words)]
    width, width_test, bad = *(max(len(getattr(o, name)) for o in chosen) for name in ('name', 'killed_by')), 0
    with ThreadPoolExecutor(N_AT_ONCE) as threads:
        first, results = threads.submit(baseline, chosen), threads.map(result, chosen)
        for mutant, said in zip(chosen, results):
            print(f'{mutant.name:{width}}  {mutant.killed_by:{width_test}}  {said}', flush=True)
            bad += not said.startswith('killed')
    for problem in first.result(): print(problem)
    print(f'{len(chosen) - bad} of {len(chosen)} mutants killed, {len(first.result())} problems without one')
    return bool(bad or first.result())

def naive(tests):
    "Which tests notice that the callback is one that was written in an evening"
    code, out = tested({CB: (ROOT/'tools'/'naive.py').read_text()}, tests)
    found = sorted(lines_of(out), key=lambda o: o[1])
    for verdict, test in found: print(f"{'passes ' if verdict == 'PASSED' else 'NOTICES'}  {test}")
    print(f"{sum(verdict != 'PASSED' for verdict, _ in found)} of {len(found)} tests notice" if found else out[-3000:])
    return not found

if __name__ == '__main__':
    for name, value in dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONWARNINGS='ignore').items(): os.environ.setdefault(name, value)
    FORKS.set_forkserver_preload(['fastai.learner', 'fastai.vision.learner', 'sklearn.datasets', 'hypothesis', 'pytest'])
    sys.exit(naive(sys.argv[2:]) if sys.argv[1:2] == ['--naive'] else main(sys.argv[1:]))
