"""How far back a model remembers: passkey, needle grid, associative recall, tasks like RULER's."""
