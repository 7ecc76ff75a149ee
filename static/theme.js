"use strict";

// Before the first paint, so that a chosen theme doesn't flash up in the system's colours.
if (localStorage.theme) document.documentElement.dataset.theme = localStorage.theme;
