{{- /* The names of all objects begin with this: "meshid" for a release called meshid. */ -}}
{{- define "meshid.name" -}}
{{- if contains .Chart.Name .Release.Name -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- /* Labels by which the pods of a component are selected; they never change. Argument: [root, component]. */ -}}
{{- define "meshid.selector" -}}
app.kubernetes.io/name: meshid-{{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end -}}

{{- define "meshid.labels" -}}
{{- $root := index . 0 -}}
{{ include "meshid.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: meshid
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* Argument: [root, name of the program]. */ -}}
{{- define "meshid.image" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end -}}
meshid/{{ index . 1 }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end -}}

{{- /* Fails for settings that other objects of the chart go by. Argument: [name of the values, the values]. */ -}}
{{- define "meshid.fixed" -}}
{{- range $key, $fix := dict "trust_domain" "set trustDomain, which CA and agents have in common" "listen" "it is what the Service leads to"
      "metrics_listen" "probes and Prometheus ask there" "data_dir" "the volume is mounted there" "socket" "pods have it mounted from there"
      "admin_socket" "its volume is mounted there" -}}
{{- if hasKey (index $ 1) $key -}}{{- fail (printf "%s.%s cannot be set: %s" (index $ 0) $key $fix) -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "meshid.ca.config" -}}
{{- include "meshid.fixed" (list "ca.config" .Values.ca.config) -}}
{{- $name := include "meshid.name" . -}}
{{- $host := printf "%s-ca.%s.svc" $name .Release.Namespace -}}
{{- $psat := dict "name" .Values.clusterName "service_accounts" (list (printf "%s/%s-agent" .Release.Namespace $name)) "token_review" dict -}}
{{- $cluster := dict "name" .Values.clusterName "entries" true
      "bundle" (dict "config_map" "meshid-bundle" "namespaces" (.Values.bundleNamespaces | default (printf "kubernetes.io/metadata.name=%s" .Release.Namespace))) -}}
{{- if .Values.trustBundles -}}
{{- $_ := set $cluster "trust_bundles" true -}}
{{- end -}}
{{- $config := dict "trust_domain" .Values.trustDomain "metrics_listen" ":9640"
      "node_attestation" (dict "k8s_psat" (dict "clusters" (list $psat)))
      "kubernetes" (dict "clusters" (list $cluster)) -}}
{{- if .Values.istio.enabled -}}
{{- $kept := dict "name" .Values.clusterName "roots" (dict "keep" .Values.istio.keepRoots)
      "istiod" (dict "keep" .Values.istio.keepIstiodCertificate "namespace" .Values.istio.namespace) -}}
{{- $_ := set $config "istio" (dict "listen" ":15012" "dns_names" (list $host) "clusters" (list $kept) "node_proxies" .Values.istio.nodeProxies) -}}
{{- end -}}
{{- mergeOverwrite $config (deepCopy .Values.ca.config) | toYaml -}}
{{- end -}}

{{- define "meshid.agent.config" -}}
{{- include "meshid.fixed" (list "agent.config" .Values.agent.config) -}}
{{- $kubelet := dict "kubelet" "https://$NODE_IP:10250" "runtime_socket" .Values.agent.runtimeSocket "cgroup_root" "/host/cgroup" -}}
{{- if .Values.agent.kubeletSelfSigned -}}
{{- $_ := set $kubelet "kubelet_ca" (printf "%s/pki/kubelet.crt" .Values.agent.kubeletDir) -}}
{{- end -}}
{{- $address := .Values.agent.caAddress | default (printf "%s-ca.%s.svc:8443" (include "meshid.name" .) .Release.Namespace) -}}
{{- $config := dict "trust_domain" .Values.trustDomain "ca" (dict "address" $address "bundle" "/etc/meshid/bundle.pem")
      "socket" "/run/meshid/workload/agent.sock" "admin_socket" "/run/meshid/admin/agent.sock" "metrics_listen" ":9641"
      "node_attestation" (dict "k8s_psat" (dict "cluster" .Values.clusterName))
      "workload_attestation" (dict "k8s" $kubelet) -}}
{{- if .Values.agent.csi -}}
{{- $_ := set $config "csi" (dict "kubelet_dir" .Values.agent.kubeletDir) -}}
{{- end -}}
{{- mergeOverwrite $config (deepCopy .Values.agent.config) | toYaml -}}
{{- end -}}

{{- /* The driver's name, which a CSIDriver object has. */ -}}
{{- define "meshid.driver" -}}
{{- dig "csi" "driver" "csi.meshid.io" .Values.agent.config -}}
{{- end -}}
