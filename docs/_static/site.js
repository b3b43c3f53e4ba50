// What the theme leaves out for readers who use a keyboard or a screen reader.
for (const scrolls of document.querySelectorAll(".table-wrapper, pre, div.math, .scrolls")) scrolls.tabIndex = 0;
for (const caption of document.querySelectorAll("p.caption[role=heading]")) caption.ariaLevel = "2";
document.querySelector(".sidebar-drawer").ariaLabel = "Pages";
document.querySelector(".toc-drawer").ariaLabel = "On this page";
