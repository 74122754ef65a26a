// Command grafana writes the dashboards beside it: it answers "what should
// somebody see of a mesh at one look", as a table of panels that is easier to
// read and to review than the JSON that Grafana wants.
//
//	go run ./deploy/grafana deploy/grafana
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

//go:generate go run . .

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: grafana DIRECTORY")
		os.Exit(2) //nolint:forbidigo // this is main
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "grafana:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func write(dir string) error {
	for _, d := range dashboards {
		text, err := json.MarshalIndent(d.render(), "", "  ")
		if err != nil {
			return fmt.Errorf("dashboard %s: %w", d.name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, d.name+".json"), append(text, '\n'), 0o644); err != nil { //nolint:gosec // it is public
			return errors.Join(fmt.Errorf("dashboard %s", d.name), err)
		}
	}
	return nil
}

// The grid of Grafana is 24 wide.
const (
	gridWidth   = 24
	statHeight  = 4
	graphHeight = 8
	graphWidth  = 12
	statWidth   = 4
)

type object = map[string]any

// datasource refers to the variable that every dashboard has.
var datasource = object{"type": "prometheus", "uid": "${datasource}"}

// render makes what Grafana imports.
func (d dashboard) render() object {
	panels := make([]object, 0, len(d.panels))
	x, y, row := 0, 0, 0
	for i, p := range d.panels {
		width, height := graphWidth, graphHeight
		if p.kind == stat {
			width, height = statWidth, statHeight
		}
		if x+width > gridWidth || height != row && x > 0 {
			x, y = 0, y+row
		}
		row = height
		panels = append(panels, p.render(i+1, object{"h": height, "w": width, "x": x, "y": y}))
		x += width
	}
	return object{
		"uid": "meshid-" + d.name, "title": "meshid: " + d.title, "description": d.description,
		"tags": []string{"meshid"}, "schemaVersion": 39, "version": 1, "editable": true,
		"time": object{"from": "now-6h", "to": "now"}, "refresh": "30s", "timezone": "browser",
		"templating": object{"list": []object{
			{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
			{
				"name": "instance", "type": "query", "label": "Instance", "datasource": datasource,
				"query": fmt.Sprintf("label_values(meshid_%s_build_info, instance)", d.program), "refresh": 2,
				"includeAll": true, "allValue": ".*", "multi": true, "current": object{"text": "All", "value": "$__all"},
			},
		}},
		"links":  []object{{"type": "dashboards", "tags": []string{"meshid"}, "title": "meshid", "asDropdown": true}},
		"panels": panels,
	}
}

func (p panel) render(id int, place object) object {
	targets := make([]object, len(p.queries))
	for i, q := range p.queries {
		targets[i] = object{
			"refId": string(rune('A' + i)), "datasource": datasource, "expr": q.expr, "legendFormat": q.legend,
		}
		if p.kind == stat {
			targets[i]["instant"] = true
		}
	}
	defaults := object{"unit": p.unit}
	if p.bad > 0 {
		defaults["thresholds"] = object{"mode": "absolute", "steps": []object{{"color": "green", "value": nil}, {"color": "red", "value": p.bad}}}
	}
	if p.low > 0 {
		defaults["thresholds"] = object{"mode": "absolute", "steps": []object{{"color": "red", "value": nil}, {"color": "green", "value": p.low}}}
	}
	options := object{"legend": object{"displayMode": "list", "placement": "bottom"}, "tooltip": object{"mode": "multi"}}
	if p.kind == stat {
		options = object{"colorMode": "value", "reduceOptions": object{"calcs": []string{"lastNotNull"}}}
	} else {
		defaults["custom"] = object{"fillOpacity": 10, "showPoints": "never"}
		defaults["min"] = 0
	}
	return object{
		"id": id, "type": string(p.kind), "title": p.title, "description": p.about, "datasource": datasource,
		"gridPos": place, "targets": targets, "options": options,
		"fieldConfig": object{"defaults": defaults, "overrides": []object{}},
	}
}
