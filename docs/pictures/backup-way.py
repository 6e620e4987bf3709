#!/usr/bin/env python3
"""Draws docs/pictures/backup-way.svg: the way of a backup from a manifest to the bucket.

Run without arguments; `cargo xtask codegen` calls it and `cargo xtask tidy` fails when the committed picture is not
what this prints.
"""
import html

WIDTH, HEIGHT = 980, 430
INK, SOFT, LINE = "#1f2933", "#52606d", "#7b8794"
OURS, APP, STORE, API = "#e3f2fd", "#fff4e0", "#e8f5e9", "#f0f1f5"

out = []


def box(x, y, w, h, fill, title, *lines):
    out.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" stroke="{LINE}"/>')
    out.append(f'<text x="{x + w / 2}" y="{y + 22}" class="t">{html.escape(title)}</text>')
    for i, line in enumerate(lines):
        out.append(f'<text x="{x + w / 2}" y="{y + 42 + 16 * i}" class="l">{html.escape(line)}</text>')


def arrow(points, number, label, at, anchor="middle"):
    path = "M" + " L".join(f"{x},{y}" for x, y in points)
    out.append(f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.6" marker-end="url(#head)"/>')
    x, y = at
    out.append(f'<text x="{x}" y="{y}" class="a" text-anchor="{anchor}"><tspan class="n">{number}</tspan> {html.escape(label)}</text>')


box(20, 20, 190, 74, API, "BackupPolicy", "what, how, when", "kubectl apply, Helm, GitOps")
box(20, 150, 190, 74, API, "Backup", "one recovery point,", "its evidence in status")
box(310, 85, 200, 92, OURS, "controller", "decides, freezes, thaws,", "captures objects,", "commits the recovery point")
out.append(f'<rect x="310" y="235" width="640" height="175" rx="10" fill="none" stroke="{LINE}" stroke-dasharray="5 4"/>')
out.append('<text x="325" y="257" class="a">every node</text>')
box(330, 285, 180, 92, APP, "application", "pods, hooks run inside", "its volumes (PVC)")
box(690, 285, 240, 92, OURS, "agent", "reads, chunks, deduplicates,", "compresses, encrypts;", "many write at once, without locks")
box(690, 40, 240, 120, STORE, "repository", "S3, or a shared file system", "packs, index, snapshots:", "immutable, created once,", "readable without the cluster")

arrow([(115, 94), (115, 148)], "①", "due or on demand", (122, 126), "start")
arrow([(210, 187), (258, 187), (258, 131), (308, 131)], "②", "resolve", (222, 206), "start")
arrow([(400, 177), (400, 283)], "③", "freeze", (392, 222), "end")
arrow([(510, 150), (600, 150), (600, 315), (688, 315)], "④", "VolumeTask", (608, 205), "start")
arrow([(688, 350), (512, 350)], "⑤", "read", (600, 368))
arrow([(810, 285), (810, 162)], "⑥", "only what is new", (818, 222), "start")
arrow([(440, 177), (440, 283)], "⑦", "thaw", (448, 222), "start")
arrow([(510, 105), (688, 105)], "⑧", "objects, then the commit", (600, 97))

print(f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="The way of a backup">
<style>
 text {{ font-family: -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: {INK} }}
 .t {{ font-size: 15px; font-weight: 600; text-anchor: middle }}
 .l {{ font-size: 12px; fill: {SOFT}; text-anchor: middle }}
 .a {{ font-size: 12px }}
 .n {{ font-weight: 700; font-size: 14px }}
</style>
<defs><marker id="head" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>''')
print("\n".join(out))
print("</svg>")
