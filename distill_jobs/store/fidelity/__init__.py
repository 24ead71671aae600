"""How much of what the teacher said a codec keeps, measured on real positions against the teacher itself.

``codings`` names what is compared, ``references`` holds the ways of others, ``compare`` the numbers of single
positions, ``summary`` their means, ``held_back`` the positions, and ``measure`` puts them together.
"""
