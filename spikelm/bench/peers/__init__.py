"""Programs that measure others' software in environments of their own; they import nothing from here."""
