"""`shoestring verify`: a few steps on one rank and in the ways a recipe is really run, compared tensor by tensor."""
