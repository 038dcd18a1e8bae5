"""Pictures of spikes and of results: one file per plot, its numbers apart from its drawing."""
