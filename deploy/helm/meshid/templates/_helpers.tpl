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

{{- /* The folder of the kubeconfig of a further cluster. Argument: its name. */ -}}
{{- define "meshid.ca.cluster" -}}
/etc/meshid-clusters/{{ . }}
{{- end -}}

{{- define "meshid.ca.config" -}}
{{- $_ := required "trustDomain is missing: write the name under which all identities are issued, such as --set trustDomain=example.org. It cannot be changed later" .Values.trustDomain -}}
{{- include "meshid.fixed" (list "ca.config" .Values.ca.config) -}}
{{- $values := .Values -}}
{{- $name := include "meshid.name" . -}}
{{- $accounts := list (printf "%s/%s-agent" .Release.Namespace $name) -}}
{{- $bundle := dict "config_map" "meshid-bundle" "namespaces" ($values.bundleNamespaces | default (printf "kubernetes.io/metadata.name=%s" .Release.Namespace)) -}}
{{- if $values.podCertificates -}}
{{- $_ := set $bundle "cluster_trust_bundle" "meshid.io:svid:bundle" -}}
{{- end -}}
{{- $psat := list -}}
{{- $clusters := list -}}
{{- $istio := list -}}
{{- range concat (list (dict "name" $values.clusterName)) $values.clusters -}}
{{- $psat = append $psat (dict "name" .name "service_accounts" $accounts "token_review" dict) -}}
{{- $cluster := dict "name" .name "entries" $values.entries "bundle" $bundle -}}
{{- if .kubeconfigSecret -}}
{{- $_ := set $cluster "kubeconfig" (printf "%s/kubeconfig" (include "meshid.ca.cluster" .name)) -}}
{{- end -}}
{{- if $values.trustBundles -}}
{{- $_ := set $cluster "trust_bundles" true -}}
{{- end -}}
{{- if $values.podCertificates -}}
{{- $_ := set $cluster "pod_certificates" (dict "signer" "meshid.io/svid") -}}
{{- end -}}
{{- $clusters = append $clusters $cluster -}}
{{- $istio = append $istio (dict "name" .name "roots" (dict "keep" $values.istio.keepRoots)
      "istiod" (dict "keep" $values.istio.keepIstiodCertificate "namespace" $values.istio.namespace)) -}}
{{- end -}}
{{- $config := dict "trust_domain" $values.trustDomain "metrics_listen" ":9640"
      "node_attestation" (dict "k8s_psat" (dict "clusters" $psat))
      "kubernetes" (dict "clusters" $clusters) -}}
{{- if $values.istio.enabled -}}
{{- $served := dict "listen" ":15012" "dns_names" (list (printf "%s-ca.%s.svc" $name .Release.Namespace)) "clusters" $istio "node_proxies" $values.istio.nodeProxies -}}
{{- if $values.istio.previousRoots -}}
{{- $_ := set $served "previous_roots" "/etc/meshid/previous-roots.pem" -}}
{{- end -}}
{{- $_ := set $config "istio" $served -}}
{{- end -}}
{{- mergeOverwrite $config (deepCopy $values.ca.config) | toYaml -}}
{{- end -}}

{{- define "meshid.agent.config" -}}
{{- $_ := required "trustDomain is missing: write the name under which all identities are issued, such as --set trustDomain=example.org. It cannot be changed later" .Values.trustDomain -}}
{{- include "meshid.fixed" (list "agent.config" .Values.agent.config) -}}
{{- $kubelet := dict "kubelet" "https://$NODE_IP:10250" "runtime_socket" .Values.agent.runtimeSocket "cgroup_root" "/host/cgroup" -}}
{{- if and (not .Values.ca.enabled) (not .Values.agent.caAddress) -}}
{{- fail "agent.caAddress is missing: without a CA here (ca.enabled: false), write host:port of the one elsewhere" -}}
{{- end -}}
{{- if and (semverCompare "<1.33-0" .Capabilities.KubeVersion.Version) (not .Values.agent.nodesProxy) -}}
{{- fail (printf "agent.nodesProxy is missing: Kubernetes %s knows no right to list a kubelet's pods and nothing else; set it to true, and see what it allows in docs/kubernetes.md, Rights" .Capabilities.KubeVersion.Version) -}}
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

{{- /* A Role without its rules, after its binding to the CA's service account. Argument: [root, name, namespace]. */ -}}
{{- define "meshid.ca.role" -}}
{{- $root := index . 0 -}}
{{- $meta := printf "name: %s\nnamespace: %s\nlabels:%s" (index . 1) (index . 2) (include "meshid.labels" (list $root "ca") | nindent 2) -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{- $meta | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ index . 1 }}}
subjects: [{kind: ServiceAccount, namespace: {{ $root.Release.Namespace }}, name: {{ include "meshid.name" $root }}-ca}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{- $meta | nindent 2 }}
{{- end -}}

{{- /* What all containers of the CA's pod have in common. */ -}}
{{- define "meshid.ca.container" -}}
{{- $name := printf "%s-ca" (include "meshid.name" .) -}}
image: {{ include "meshid.image" (list . "ca") }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
resources: {{- toYaml .Values.ca.resources | nindent 2 }}
volumeMounts:
  - {name: config, mountPath: /etc/meshid, readOnly: true}
  - {name: data, mountPath: /var/lib/meshid}
  - {name: run, mountPath: /run/meshid-ca} # the admin socket: `kubectl exec {{ $name }}-0 -- ca status`
  - {name: tmp, mountPath: /tmp}
  {{- range .Values.clusters }}
  - {name: cluster-{{ .name | replace "_" "-" }}, mountPath: {{ include "meshid.ca.cluster" .name }}, readOnly: true}
  {{- end }}
  {{- with .Values.ca.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* The files of the CA's ConfigMap. */ -}}
{{- define "meshid.ca.files" -}}
ca.yaml: |
  {{- include "meshid.ca.config" . | nindent 2 }}
{{- with .Values.istio.previousRoots }}
previous-roots.pem: |
  {{- . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "meshid.ca.security" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532 # to make its folder in a new volume
# Not at each start: it would open files to the group that are the CA's alone, such as the root's key.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- /* The volumes of the CA's pod but for its data. Argument: [root, name of the ConfigMap]. */ -}}
{{- define "meshid.ca.volumes" -}}
{{- $root := index . 0 -}}
- name: config
  configMap: {name: {{ index . 1 }}}
- name: run
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
- name: tmp
  emptyDir: {sizeLimit: 256Mi}
{{- range $root.Values.clusters }}
- name: cluster-{{ .name | replace "_" "-" }}
  secret: {secretName: {{ .kubeconfigSecret }}}
{{- end }}
{{- with $root.Values.ca.volumes }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}
