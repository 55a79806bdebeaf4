"Losses of this room, from their papers, in float64 and without torch."
CASES = []
