"Distillation losses, by what they compare"
