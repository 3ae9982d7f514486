"""The style of a page. Colours are Okabe and Ito's, which those who see red and green alike can tell apart."""

STYLE = """
:root { --ink: #1b1b1b; --soft: #555; --paper: #fff; --rule: #d5d5d5; --grid: #f2f2f2; --line: #fff;
  --weights: #0072b2; --gradients: #e69f00; --optimizer: #009e73; --activations: #cc79a7; --staging: #999; --alarm: #b33a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #aaa; --paper: #161616; --rule: #3a3a3a; --grid: #242424;
  --line: #161616; --weights: #56b4e9; --gradients: #f0b73a; --optimizer: #2bc49a; --activations: #e39cc6; --staging: #8a8a8a;
  --alarm: #ff8c5a; } }
@media print { :root { --ink: #000; --soft: #333; --paper: #fff; --rule: #999; --grid: #eee; --line: #fff; }
  section, figure { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 22px; line-height: 1.35; margin: 8px 0; font-weight: 600; }
h2 { font-size: 17px; margin: 34px 0 8px; border-bottom: 1px solid var(--rule); padding-bottom: 4px; }
p, li { max-width: 75ch; } p { margin: 8px 0; } ul { padding-left: 20px; margin: 8px 0; }
.summary, figcaption { color: var(--soft); } p, li, td, h1, figcaption { overflow-wrap: anywhere; }
figcaption b { color: var(--ink); }
table { border-collapse: collapse; width: 100%; max-width: 820px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 0 4px 10px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; color: var(--soft); } td:not(:first-child) { white-space: nowrap; } .strong td { font-weight: 600; }
figure { margin: 14px 0 22px; }
.chart { display: block; width: 100%; background: var(--grid); }
.tall { height: 170px; } .short { height: 110px; } .lane-row { height: 22px; }
.definitions { position: absolute; }
.line { stroke: var(--line); stroke-width: 1.2; fill: none; } .dot { fill: var(--line); }
.c-weights { fill: var(--weights); } .c-gradients { fill: var(--gradients); } .c-optimizer { fill: var(--optimizer); }
.c-activations { fill: var(--activations); } .c-staging { fill: var(--staging); }
.area { stroke: var(--paper); stroke-width: 0.5; vector-effect: non-scaling-stroke; }
.budget { stroke: var(--alarm); stroke-width: 2; stroke-dasharray: 7 4; fill: none; vector-effect: non-scaling-stroke; }
.phase { fill: none; } .phase-backward { fill: var(--rule); opacity: 0.55; }
.curve { fill: none; stroke: var(--weights); stroke-width: 2; vector-effect: non-scaling-stroke; }
.row { display: grid; grid-template-columns: 190px 1fr; align-items: center; margin: 2px 0; }
.name { display: flex; justify-content: space-between; padding-right: 12px; font-size: 14px; }
.name span { color: var(--soft); font-variant-numeric: tabular-nums; }
.lane { fill: var(--weights); } .lane-stall { fill: var(--alarm); }
.lane-nvme_read, .lane-nvme_write { fill: var(--optimizer); } .lane-adam { fill: var(--gradients); }
.lane-host_to_device, .lane-device_to_host { fill: var(--activations); } .lane-commit { fill: var(--staging); }
.band-forward { fill: var(--rule); stroke: var(--soft); } .band-backward { fill: var(--soft); } .band-update { fill: var(--ink); }
.axis { display: flex; justify-content: space-between; font-size: 12px; color: var(--soft); padding-top: 2px; gap: 6px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; font-size: 13px; }
.legend li { display: flex; align-items: center; gap: 6px; } .key { width: 14px; height: 14px; flex: none; }
@media (max-width: 640px) { body { font-size: 14px; } h1 { font-size: 19px; } .row { display: block; margin: 6px 0; }
  .name { padding-right: 0; } table { font-size: 12.5px; } th, td { padding-left: 6px; } }
"""
