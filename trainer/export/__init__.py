"""From a finished run to a file others can use, and what that file really costs to run."""
