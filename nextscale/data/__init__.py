"""Images in: drawings of emoji, image folders, reading and writing, augmentation. Nothing is imported here."""
