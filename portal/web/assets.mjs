// Copies the browser assets that the pages use out of node_modules, and joins the icons into one sprite.
// Nothing is compiled: what npm's lock file pins is what the browser gets.
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..", "..");
const vendor = join(root, "portal", "web", "static", "vendor");
const modules = join(root, "node_modules");

const files = {
  "htmx.min.js": "htmx.org/dist/htmx.min.js",
  "htmx-sse.js": "htmx-ext-sse/dist/sse.min.js",
  "tabler.min.css": "@tabler/core/dist/css/tabler.min.css",
  "tabler.min.js": "@tabler/core/dist/js/tabler.min.js",
  "uplot.min.js": "uplot/dist/uPlot.iife.min.js",
  "uplot.min.css": "uplot/dist/uPlot.min.css",
  "swagger-ui/swagger-ui.css": "swagger-ui-dist/swagger-ui.css",
  "swagger-ui/swagger-ui-bundle.js": "swagger-ui-dist/swagger-ui-bundle.js",
  "swagger-ui/swagger-ui-standalone-preset.js": "swagger-ui-dist/swagger-ui-standalone-preset.js",
  "swagger-ui/favicon-32x32.png": "swagger-ui-dist/favicon-32x32.png",
};

const icons = [
  "alert-triangle", "arrow-left", "ban", "chart-line", "check", "chevron-right", "circle-check", "circle-x", "clock", "cloud-off", "copy",
  "cpu", "device-desktop", "download", "external-link", "eye", "file-certificate", "fingerprint", "home", "key", "language",
  "list-check", "list-details", "lock", "logout", "moon", "player-play", "player-stop", "plug", "plus", "refresh", "search",
  "server-2", "settings", "shield-check", "snowflake", "sun", "terminal-2", "tools", "trash", "user", "users", "world", "x",
];

const symbol = (name) =>
  readFileSync(join(modules, "@tabler/icons/icons/outline", `${name}.svg`), "utf8")
    .replace(/<!--[\s\S]*?-->/g, "")
    .replace(/<svg[\s\S]*?>/, `<symbol id="${name}" viewBox="0 0 24 24">`)
    .replace("</svg>", "</symbol>")
    .replace(/\s*\n\s*/g, "");

rmSync(vendor, { recursive: true, force: true });
for (const [target, source] of Object.entries(files)) {
  mkdirSync(dirname(join(vendor, target)), { recursive: true });
  cpSync(join(modules, source), join(vendor, target));
}
writeFileSync(
  join(vendor, "icons.svg"),
  `<svg xmlns="http://www.w3.org/2000/svg">${icons.map(symbol).join("")}</svg>\n`,
);
