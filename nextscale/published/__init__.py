"""Models published by others: the layouts of their files, and conversion there and back."""
