"""Other ways to learn a density, beside NICE, on one split for one time.

`python -m bench generative` runs it all.

gaussians   maximum likelihood in closed form, and scikit-learn's mixture
vae         a variational auto-encoder: a lower bound
gan         a generative adversarial network: samples alone
training    one loop for all that is trained by steps, by the clock or by a count of steps
quality     how good samples are: precision, recall, kernel MMD
models      all of them behind one interface
measure     likelihoods, bounds, rates, samples of each
planar      densities and Bayes' rule in the plane
pictures    PNGs
table       Markdown
command     the command line
"""
