"""Other ways to compute what model/ says, for particular hardware; nobody needs them to understand a step."""
