"""asyncrl: asynchronous actor-learner deep RL for long, unattended runs on one box."""
